"""flowra_allocation."""
