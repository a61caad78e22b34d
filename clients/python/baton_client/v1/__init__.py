"""Generated when the package is built: `inference_pb2` has the messages, `inference_pb2_grpc` the stub."""
