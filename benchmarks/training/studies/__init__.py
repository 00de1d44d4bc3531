"""Studies of one question each, with their own arms."""
