"""What few need: experimental readings."""
