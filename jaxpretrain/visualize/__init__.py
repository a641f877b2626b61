"""Pictures of a run: curves, reconstructions, and one page that shows all of it."""
