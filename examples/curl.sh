#!/usr/bin/env bash
# A completion, and a chat whose answer streams as server-sent events.
set -euo pipefail
url=${BATON_URL:-http://127.0.0.1:8000}

curl --fail --silent --show-error "$url/v1/completions" -H 'content-type: application/json' \
  -d '{"prompt": "def __init__(self", "max_tokens": 24, "temperature": 0}'
echo
curl --fail --silent --show-error --no-buffer "$url/v1/chat/completions" -H 'content-type: application/json' \
  -d '{"messages": [{"role": "user", "content": "Add two numbers."}], "max_tokens": 24, "stream": true}'
