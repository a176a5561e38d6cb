#!/bin/bash
# As the image's own: a key for its sessions, and the page.
export WEBUI_SECRET_KEY=of-the-compose-test HF_HUB_OFFLINE=1 RAG_EMBEDDING_ENGINE=openai
exec "$BOX_ENGINES/open-webui/bin/python" -c 'from open_webui import app; app()' \
  serve --host 0.0.0.0 --port 8080
