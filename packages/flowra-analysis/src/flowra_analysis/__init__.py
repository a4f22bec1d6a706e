"""flowra_analysis."""
