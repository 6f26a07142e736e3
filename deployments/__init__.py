"""Ray Serve around the engine: app builder, gateway, replica, router, journal, OpenAI schema, command line."""
