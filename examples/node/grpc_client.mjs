// A prompt over the public gRPC API, from Node: npm install, then node grpc_client.mjs
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const protos = new URL("../../protos", import.meta.url).pathname;
const definition = loadSync("baton/v1/inference.proto", { includeDirs: [protos], keepCase: true });
const { Inference } = grpc.loadPackageDefinition(definition).baton.v1;

const address = process.env.BATON_GRPC ?? "127.0.0.1:8001";
const client = new Inference(address, grpc.credentials.createInsecure());
const request = { text: "class Foo", sampling: { max_tokens: 24, temperature: 0 }, stream: true };

const call = client.Generate(request, { deadline: Date.now() + 60_000 });
let last;
for await (const part of call) {
  process.stdout.write(part.text);
  last = part;
}
console.log(`\n${last.usage.completion_tokens} tokens, ended by ${last.finish_reason}`);
client.close();
