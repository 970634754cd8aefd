"""Export generators for other runtimes: nothing that trains or generates imports this."""
