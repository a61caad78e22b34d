"""A prompt over the public gRPC API: its tokens and their ids as they come."""

import os

import grpc

from baton.v1 import inference_pb2 as pb
from baton.v1.inference_pb2_grpc import InferenceStub

with grpc.insecure_channel(os.environ.get("BATON_GRPC", "127.0.0.1:8001")) as channel:
    stub = InferenceStub(channel)
    request = pb.GenerateRequest(
        text="class Foo", sampling=pb.Sampling(max_tokens=24, temperature=0), stream=True
    )
    for part in stub.Generate(request, timeout=60):
        print(part.text, end="", flush=True)
    print(f"\n{part.usage.completion_tokens} tokens, ended by {part.finish_reason}")
