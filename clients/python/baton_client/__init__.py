"""The stubs of Baton's public gRPC API: `baton_client.v1`."""
