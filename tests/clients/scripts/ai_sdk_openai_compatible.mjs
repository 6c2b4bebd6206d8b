import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { check } from './ai_sdk.mjs';

await check((url) => createOpenAICompatible({ name: 'local', baseURL: `${url}/v1`, supportsStructuredOutputs: true }));
