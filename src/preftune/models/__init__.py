"""Models: loading and saving them, adapters, and what their files say before they are loaded."""
