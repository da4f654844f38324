"""What people look at after a run: metrics read back, plots, the HTML page."""
