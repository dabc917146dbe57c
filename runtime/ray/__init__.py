"""Ray Serve: the HTTP server in one deployment, and in front of engines in another, one replica for each GPU."""
