"""What the exporter changes in a network or its graph, whatever its family."""
