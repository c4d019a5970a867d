"""Datasets: embedded, downloaded, or of the user's own."""
