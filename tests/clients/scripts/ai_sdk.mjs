// What both providers of Vercel's AI SDK are asked: PROVIDER(url) makes one.
import { generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from 'ai';
import { LOOP, MODEL, PARAMETERS, QUESTION, RESULT, SAID, TRIP, URL, WEATHER, isCity, isStream, isTrip, report } from './common.mjs';

export async function check(provider) {
    const options = { model: provider(URL)(MODEL), prompt: QUESTION, temperature: 0, maxOutputTokens: 60, maxRetries: 0 };
    const whole = (await generateText(options)).text;
    const pieces = [];
    for await (const piece of streamText(options).textStream) pieces.push(piece);
    const trip = (await generateObject({ ...options, schema: jsonSchema(TRIP) })).object;
    let asked = 0;
    const weather = tool({ description: 'The weather of a city', inputSchema: jsonSchema(PARAMETERS),
        execute: async () => { asked += 1; return RESULT; } });
    const forced = await generateText({ ...options, tools: { weather }, toolChoice: 'required' });
    const looped = await generateText({ model: provider(LOOP)(MODEL), prompt: WEATHER, tools: { weather },
        stopWhen: stepCountIs(3), maxRetries: 0 });
    report({ chat: whole !== '', stream: isStream(pieces, whole), structured: isTrip(trip),
        tools: isCity(forced.toolCalls[0].input) && asked === 2 && looped.text === SAID });
}
