"""How files are written whole and read with care: all or nothing, limits, no pickle."""
