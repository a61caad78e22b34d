"""A client made from the generated stubs alone, against real processes."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.v1 import inference_pb2 as pb
from baton.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.processes import Cluster, wait_until


def test_generate_streams_text_and_token_ids(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        stub = InferenceStub(channel)
        sampling = pb.Sampling(max_tokens=24, temperature=0)
        streamed = list(stub.Generate(pb.GenerateRequest(text="class Foo", sampling=sampling, stream=True)))
        [whole] = stub.Generate(pb.GenerateRequest(text="class Foo", sampling=sampling))
        assert len(streamed) > 10
        assert "".join(part.text for part in streamed) == whole.text
        assert [i for part in streamed for i in part.token_ids] == list(whole.token_ids)
        assert whole.finish_reason == "length"
        assert whole.usage.completion_tokens == 24
        ids = stub.Tokenize(pb.TokenizeRequest(text="class Foo")).token_ids
        [from_ids] = stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling))
        assert from_ids.text == whole.text
        assert stub.Detokenize(pb.DetokenizeRequest(token_ids=whole.token_ids)).text == whole.text
        assert [model.id for model in stub.ListModels(pb.ListModelsRequest()).models] == ["demo"]


def test_errors_have_codes_and_words(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        stub = InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(text="x", sampling=pb.Sampling(top_p=7))))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "top_p" in str(caught.value.details())
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(text="x", model="gpt-9")))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_cancel_frees_the_pages(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        sampling = pb.Sampling(max_tokens=1800, ignore_eos=True)
        call = InferenceStub(channel).Generate(
            pb.GenerateRequest(text="import", sampling=sampling, stream=True)
        )
        next(call)
        call.cancel()
    wait_until(cluster.pages_are_free, "the pages are back in the pool", 5)


@pytest.mark.parametrize("service", ["router", "prefill", "decode"])
def test_health_and_reflection(cluster: Cluster, service: str) -> None:
    address = cluster.grpc_address if service == "router" else cluster.worker_address(service)
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        [answer] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([listing]), timeout=5
        )
        names = {entry.name for entry in answer.list_services_response.service}
        own = {"router": "Inference", "prefill": "Worker", "decode": "Transfer"}[service]
        assert f"baton.v1.{own}" in names
