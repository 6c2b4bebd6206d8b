import { createOpenAI } from '@ai-sdk/openai';
import { check } from './ai_sdk.mjs';

await check((url) => createOpenAI({ baseURL: `${url}/v1`, apiKey: 'none' }));      // by /v1/responses
