"""The server: OpenAI's endpoint, and the writer's page."""
