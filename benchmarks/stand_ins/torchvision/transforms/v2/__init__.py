"""What transformers imports and the example does not use."""
