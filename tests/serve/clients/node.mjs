// The openai package as its guide has it: node node.mjs URL
import assert from "node:assert";
import { createRequire } from "node:module";
const OpenAI = createRequire(`${process.cwd()}/`)("openai").OpenAI;

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none" });
const asked = { model: "tiny", messages: [{ role: "user", content: "hello" }], temperature: 0, max_tokens: 5 };
const answer = await client.chat.completions.create(asked);
assert.equal(answer.usage.completion_tokens, 5);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, answer.choices[0].message.content);
const runner = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
assert.equal((await runner.finalChatCompletion()).choices[0].message.content, text);
for await (const model of client.models.list()) assert.equal(model.id, "tiny");
const scored = await client.completions.create({ model: "tiny", prompt: "hello", echo: true, logprobs: 1, max_tokens: 0 });
assert.equal(scored.choices[0].logprobs.token_logprobs[0], null);
console.log("openai", (await import("node:process")).version);
