"""Engines: the bundle format, and building, caching, opening and executing its graphs on a backend."""
