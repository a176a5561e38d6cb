#!/bin/sh
# await-room.sh SHARE COMMAND...: runs COMMAND as soon as this share of every card's memory is free.
#
# vLLM exits if its share of the memory is not free. In an exclusive placement that happens whenever
# it restarts while Ollama holds the GPU: then it waits here, and loads after the next hand-over.
# If nvidia-smi fails, COMMAND starts and reports the fault itself.
share=$1
shift

room() {
  nvidia-smi --query-gpu=memory.free,memory.used --format=csv,noheader,nounits |
    awk -F, -v share="$share" '$1 < share * ($1 + $2) { full = 1 } END { exit full }'
}

trap 'exit 0' TERM INT
if command -v nvidia-smi >/dev/null && ! room; then
  echo "await-room: waiting until a share of $share of every card is free"
  until room; do sleep 1; done
fi
exec "$@"
