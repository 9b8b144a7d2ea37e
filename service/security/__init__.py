"""Who may ask: keys, rates, and what browsers let pages do."""
