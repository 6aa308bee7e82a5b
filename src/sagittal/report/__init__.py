"""Pictures and HTML pages: what was measured, shown so that it can be judged. No torch."""
