"""From downloads and photos to raw folders: nothing that trains or generates imports this."""
