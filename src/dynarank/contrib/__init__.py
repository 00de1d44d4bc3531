"""Experimental monitors."""
