#!/bin/sh
# await-room.sh SHARE COMMAND...: runs COMMAND as soon as this share of every card is free.
#
# vLLM ends where it does not find the memory it is to take. In an exclusive placement that is so
# whenever it starts anew while Ollama has the cards: it waits here, and loads when the gateway
# gives it its turn. Where no card can be seen, COMMAND says what is wrong.
share=$1
shift

room() {
  nvidia-smi --query-gpu=memory.free,memory.used --format=csv,noheader,nounits |
    awk -F, -v share="$share" '$1 < share * ($1 + $2) { full = 1 } END { exit full }'
}

trap 'exit 0' TERM INT
if command -v nvidia-smi >/dev/null && ! room; then
  echo "await-room: waits until $share of every card is free"
  until room; do sleep 1; done
fi
exec "$@"
