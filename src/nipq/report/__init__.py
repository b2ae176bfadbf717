"""Reports on models: ``inspect`` before preparation, ``summary`` at any time after it."""
