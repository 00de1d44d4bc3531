"""The trainers of others drive a rank scheduler: each by a callback or one call, each an extra."""
