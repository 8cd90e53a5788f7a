"""Models and what runs them: names, heads, the backend protocol and its implementations."""
