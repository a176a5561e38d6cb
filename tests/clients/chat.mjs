// One chat through the openai package for Node; prints what a program would see, as JSON.
// Usage: node chat.mjs '{"baseURL": "http://…/v1", "maxRetries": 0, "request": {…}}'

import OpenAI from "openai";

const { request, ...options } = JSON.parse(process.argv[2]);
const client = new OpenAI({ apiKey: "none", ...options });
const seen = { text: "", finish: null, usage: null, chunks: 0, error: null };

try {
  const answer = await client.chat.completions.create(request);
  for await (const chunk of request.stream ? answer : [answer]) {
    seen.chunks += 1;
    seen.usage = chunk.usage ?? seen.usage;
    for (const choice of chunk.choices) {
      seen.text += (choice.delta ?? choice.message).content ?? "";
      seen.finish = choice.finish_reason ?? seen.finish;
    }
  }
} catch (error) {
  const { status = null, code = null, param = null, type = null, requestID = null } = error;
  const { name } = error.constructor;
  seen.error = { name, message: error.message, status, code, param, type, requestID };
}

console.log(JSON.stringify(seen));
