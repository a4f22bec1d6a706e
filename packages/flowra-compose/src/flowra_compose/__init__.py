"""flowra_compose."""
