"""The session of `medusa chat`."""
