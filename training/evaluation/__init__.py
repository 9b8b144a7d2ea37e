"""Quality tables: what is made, what it is measured by, and how that is shown."""
