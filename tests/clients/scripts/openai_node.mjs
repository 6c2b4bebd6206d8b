import OpenAI from 'openai';
import { LOOP, MODEL, RESULT, SAID, TOOL, TRIP, URL, USER, WEATHER, isCity, isStream, isTrip, report } from './common.mjs';

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: 'none', maxRetries: 0 });
const loop = new OpenAI({ baseURL: `${LOOP}/v1`, apiKey: 'none', maxRetries: 0 });
const options = { model: MODEL, messages: USER, temperature: 0, max_tokens: 60 };
const whole = (await client.chat.completions.create(options)).choices[0].message.content;
const pieces = [];
for await (const chunk of await client.chat.completions.create({ ...options, stream: true }))
    pieces.push(chunk.choices[0].delta.content ?? '');
const schema = { type: 'json_schema', json_schema: { name: 'trip', strict: true, schema: TRIP } };
const trip = JSON.parse((await client.chat.completions.create({ ...options, response_format: schema })).choices[0].message.content);
const forced = await client.chat.completions.create({ ...options, tools: [TOOL], tool_choice: 'required' });
let asked = 0;
const weather = { ...TOOL.function, parse: JSON.parse, function: () => { asked += 1; return RESULT; } };
const said = await loop.chat.completions.runTools({ model: MODEL, messages: [{ role: 'user', content: WEATHER }],
    stream: true, tools: [{ type: 'function', function: weather }] }).finalContent();
report({ chat: whole !== '', stream: isStream(pieces, whole), structured: isTrip(trip),
    tools: isCity(JSON.parse(forced.choices[0].message.tool_calls[0].function.arguments)) && asked === 1 && said === SAID });
