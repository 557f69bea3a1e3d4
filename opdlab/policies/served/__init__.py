"""A teacher on a server: the client, its two protocols, and the server of ``opdlab serve-teacher``."""
