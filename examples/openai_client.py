"""A completion and a chat that streams, with OpenAI's client."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("BATON_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
model = client.models.list().data[0].id

completion = client.completions.create(model=model, prompt="def __init__(self", max_tokens=24, temperature=0)
print(completion.choices[0].text)

chat = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Add two numbers."}],
    max_tokens=24,
    stream=True,
)
for chunk in chat:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
