// The official JavaScript client against a running server; the first thing that is not as it should be ends it.
//
//     npm install openai && node benchmarks/clients/openai_js.mjs http://127.0.0.1:8000/v1
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const found = createRequire(path.join(process.cwd(), "here.js")).resolve("openai"); // from where npm installed it
const { default: OpenAI } = await import(pathToFileURL(found));

const client = new OpenAI({ baseURL: process.argv[2], apiKey: process.env.MEDUSA_API_KEY ?? "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const ask = (more) =>
  client.chat.completions.create({
    model,
    messages: [{ role: "user", content: "Why is the sky blue? Answer in two sentences." }],
    max_tokens: 40,
    temperature: 0,
    ...more,
  });
const collect = async (stream) => {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
};
const textOf = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join("");

const checks = {
  async "a chat"() {
    const answer = await ask();
    assert.ok(answer.choices[0].message.content.length > 10);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },
  async "a stream, with its usage at the end"() {
    const chunks = await collect(await ask({ stream: true, stream_options: { include_usage: true } }));
    assert.equal(textOf(chunks), (await ask()).choices[0].message.content);
    assert.ok(chunks.at(-1).usage.completion_tokens > 0);
  },
  async "the client's own runner of streams"() {
    const { messages } = { messages: [{ role: "user", content: "Say hello." }] };
    const runner = client.chat.completions.stream({ model, messages, max_tokens: 20, temperature: 0 });
    const final = await runner.finalChatCompletion();
    assert.ok(final.choices[0].message.content.length > 0);
  },
  async "a stream that is left ends at the server too"() {
    const stream = await ask({ stream: true, max_tokens: 400 });
    for await (const _ of stream) break;
    stream.controller.abort();
  },
  async "stop strings"() {
    const whole = (await ask()).choices[0].message.content;
    const stop = whole.slice(12, 16);
    const cut = (await ask({ stop: [stop] })).choices[0];
    assert.equal(cut.message.content, whole.slice(0, whole.indexOf(stop)));
    assert.equal(cut.finish_reason, "stop");
  },
  async "a seed gives the text again, and n texts"() {
    const [first, again] = await Promise.all([ask({ seed: 7, temperature: 1, n: 2 }), ask({ seed: 7, temperature: 1, n: 2 })]);
    const texts = (answer) => answer.choices.map((choice) => choice.message.content);
    assert.deepEqual(texts(first), texts(again));
    assert.notEqual(texts(first)[0], texts(first)[1]);
  },
  async "log-probabilities"() {
    const { content } = (await ask({ logprobs: true, top_logprobs: 3, max_tokens: 5 })).choices[0].logprobs;
    assert.equal(content.length, 5);
    for (const token of content) {
      assert.equal(token.top_logprobs.length, 3);
      assert.ok(token.logprob <= 0 && token.logprob === token.top_logprobs[0].logprob);
    }
  },
  async "JSON by a schema"() {
    const schema = {
      type: "object",
      properties: { colour: { enum: ["red", "blue"] }, number: { type: "integer", minimum: 0, maximum: 9 } },
      required: ["colour", "number"],
      additionalProperties: false,
    };
    const format = { type: "json_schema", json_schema: { name: "it", schema, strict: true } };
    const parsed = await client.chat.completions.parse({
      model, messages: [{ role: "user", content: "A colour and a number as JSON." }], response_format: format, seed: 1,
    });
    const made = parsed.choices[0].message.parsed ?? JSON.parse(parsed.choices[0].message.content);
    assert.ok(["red", "blue"].includes(made.colour) && made.number >= 0 && made.number <= 9);
  },
  async "tools, whole, streamed, and answered"() {
    const parameters = { type: "object", properties: { city: { enum: ["Rome", "Oslo"] } }, required: ["city"], additionalProperties: false };
    const tools = [{ type: "function", function: { name: "get_weather", parameters, strict: true } }];
    const more = { tools, tool_choice: "required", max_tokens: 100, parallel_tool_calls: false };
    const { message, finish_reason } = (await ask(more)).choices[0];
    assert.equal(finish_reason, "tool_calls");
    const call = message.tool_calls[0];
    assert.ok(["Rome", "Oslo"].includes(JSON.parse(call.function.arguments).city));
    const deltas = (await collect(await ask({ ...more, stream: true }))).flatMap((c) => c.choices[0]?.delta?.tool_calls ?? []);
    assert.equal(deltas.map((d) => d.function.arguments).join(""), call.function.arguments);
    const messages = [{ role: "user", content: "Weather?" }, message, { role: "tool", tool_call_id: call.id, content: "Rain." }];
    assert.ok((await ask({ tools, messages })).choices[0].message);
    const runner = client.chat.completions.runTools({
      model, max_tokens: 100, temperature: 0, messages: [{ role: "user", content: "Weather in Oslo?" }], tool_choice: { type: "function", function: { name: "get_weather" } },
      tools: [{ type: "function", function: { name: "get_weather", parameters, function: () => "Rain.", parse: JSON.parse } }],
    });
    assert.equal(await runner.finalFunctionToolCallResult(), "Rain.");
  },
  async "completions and responses, whole and streamed"() {
    const text = await client.completions.create({ model, prompt: "One, two,", max_tokens: 8, temperature: 0 });
    const pieces = await collect(await client.completions.create({ model, prompt: "One, two,", max_tokens: 8, temperature: 0, stream: true }));
    assert.equal(pieces.map((piece) => piece.choices[0].text).join(""), text.choices[0].text);
    const asked = { model, input: "Say hello.", max_output_tokens: 20, temperature: 0 };
    const response = await client.responses.create(asked);
    const events = await collect(await client.responses.create({ ...asked, stream: true }));
    const said = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta).join("");
    assert.equal(said, response.output_text);
    assert.ok(["response.completed", "response.incomplete"].includes(events.at(-1).type));
    assert.equal((await client.responses.stream(asked).finalResponse()).output_text, said);
  },
  async "errors"() {
    const fails = async (promise, kind, param) => {
      const error = await promise.then(() => assert.fail("it was not refused"), (error) => error);
      assert.ok(error instanceof kind, String(error));
      assert.equal(error.param ?? null, param);
    };
    await fails(ask({ model: "gpt-9" }), OpenAI.NotFoundError, "model");
    await fails(ask({ temperature: -1 }), OpenAI.BadRequestError, "temperature");
    await fails(ask({ unheard_of: 1 }), OpenAI.BadRequestError, "unheard_of");
    await fails(ask({ messages: [{ role: "user", content: "word ".repeat(300000) }] }), OpenAI.BadRequestError, "messages");
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log("passed:", name);
}
