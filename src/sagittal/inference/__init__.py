"""Whole scans through a network of fixed window, and back to the scan's grid."""
