#!/bin/sh
# pull.sh FOLDER COMMAND...: runs COMMAND, which downloads into FOLDER, and says every ten seconds
# how far it is. A progress bar draws over itself, which in a log nobody sees before its end.
folder=$1
shift
said=$(mktemp)

last() { # the last lines of what it has said; a bar draws over itself, and in colours
  tr '\r' '\n' <"$said" | sed 's/\x1b\[[0-9;?]*[a-zA-Z]//g' | grep . | tail -n "$1"
}

"$@" >"$said" 2>&1 &
command=$!
trap 'kill $command 2>/dev/null' TERM INT
while kill -0 $command 2>/dev/null; do
  echo "$(du -sh "$folder" | cut -f 1) there | $(last 1)"
  seconds=0
  while [ $seconds -lt "${EVERY_S:-10}" ] && kill -0 $command 2>/dev/null; do
    sleep 1
    seconds=$((seconds + 1))
  done
done
wait $command
code=$?
if [ $code = 0 ]; then
  echo "$(du -sh "$folder" | cut -f 1) there: done"
else
  last 20
  echo "ended with code $code; run it again, it goes on where it was"
fi
exit $code
