"""How ranks share one model's layers."""
