"""What a server does under load: step-time curves, mixes of requests, a simulator, a paced device, and real load."""
