"""Turn downloads and photos into raw folders: nothing that trains or generates imports this."""
