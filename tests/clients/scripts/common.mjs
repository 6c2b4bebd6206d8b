// As common.py, for clients in JavaScript.
export const [URL, LOOP, MODEL] = process.argv.slice(2);
export const USER = [{ role: 'user', content: 'What should I see in Paris?' }];
export const QUESTION = USER[0].content;
export const WEATHER = 'What is the weather in Paris?';
export const RESULT = '21 degrees';
export const SAID = 'It is 21 degrees.';
export const PARAMETERS = { type: 'object', properties: { city: { type: 'string', enum: ['Paris', 'Rome'] } }, required: ['city'] };
export const TOOL = { type: 'function', function: { name: 'weather', description: 'The weather of a city', parameters: PARAMETERS } };
export const TRIP = { type: 'object', required: ['city', 'days'], additionalProperties: false,
    properties: { city: { type: 'string', enum: ['Paris', 'Rome'] }, days: { type: 'integer', minimum: 1, maximum: 9 } } };

export const isCity = (value) => ['Paris', 'Rome'].includes(value.city);
export const isTrip = (value) => isCity(value) && Object.keys(value).length === 2 && value.days >= 1 && value.days <= 9;
export const isStream = (pieces, whole) => pieces.length > 2 && whole !== '' && pieces.join('') === whole;
export const report = (can) => console.log(JSON.stringify(can));
