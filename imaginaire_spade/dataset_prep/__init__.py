"""Turn downloads and photos into raw folders. Nothing that trains or generates imports this."""
