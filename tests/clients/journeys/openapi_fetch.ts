// The journey with openapi-fetch over the types of openapi-typescript.
import createClient from 'openapi-fetch';
import type { components, paths } from './client';

declare const process: { env: Record<string, string> };
const { ARBITER_URL, FUTURE_URL, PROXY_TOKEN, OPERATOR_TOKEN, AGENT } = process.env;
type Problem = components['schemas']['Problem'];

function assert(holds: boolean, ...what: unknown[]): asserts holds {
    if (!holds) throw new Error(`assertion failed ${JSON.stringify(what)}`);
}

function connect(baseUrl: string, token: string) {
    return createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });
}

function denied(status: number, answer: { error?: Problem; response: Response }): Problem {
    assert(answer.response.status === status && answer.error !== undefined, answer.error);
    return answer.error;
}

async function main() {
    const proxy = connect(ARBITER_URL, PROXY_TOKEN), operator = connect(ARBITER_URL, OPERATOR_TOKEN);
    const grant = {
        agent_id: AGENT, declared_intent: 'journey', authorized_tools: ['read_file', 'fs.*'],
    };
    const created = await proxy.POST('/sessions', { body: grant });
    assert(created.data?.call_budget === 1000 && created.data.time_limit_secs === 1800);
    console.log('create');
    const { session_id } = created.data;
    const path = { session_id };
    const read = await proxy.GET('/sessions/{session_id}', { params: { path } });
    assert(read.data?.status === 'active');
    console.log('read');
    const CALLS = '/sessions/{session_id}/calls';
    const plain = await proxy.POST(CALLS, { params: { path }, body: { tool_name: 'read_file' } });
    assert(plain.data?.calls_made === 1);
    console.log('call');
    const body = { tool_name: 'fs.list', agent_id: AGENT, data_sensitivity: 'internal' as const };
    const keyed = { params: { path, header: { 'Idempotency-Key': 'step-1' } }, body };
    const first = await proxy.POST(CALLS, keyed), again = await proxy.POST(CALLS, keyed);
    assert(first.data?.calls_made === 2 && again.data?.calls_made === 2);
    assert(first.response.headers.get('Idempotency-Replayed') === null);
    assert(again.response.headers.get('Idempotency-Replayed') === 'true');
    console.log('repeat');
    const header = { Prefer: 'return=minimal' as const };
    const minimal = await proxy.POST(CALLS, { params: { path, header }, body });
    assert(minimal.response.status === 204 && !minimal.data && !minimal.error);
    console.log('minimal');
    const batch = await proxy.POST('/sessions/{session_id}/batch', {
        params: { path }, body: { tool_names: ['fs.list', 'fs.stat'] },
    });
    assert(batch.data?.calls_made === 5);
    console.log('batch');
    const dry = await proxy.POST(CALLS, { params: { path, query: { dry_run: true } }, body });
    assert(dry.data?.calls_made === 6);
    const after = await proxy.GET('/sessions/{session_id}', { params: { path } });
    assert(after.data?.calls_made === 5);
    console.log('dry run');
    let problem = denied(403, await proxy.POST(CALLS, { params: { path }, body: { tool_name: 'rm' } }));
    assert(problem.code === 'tool_not_authorized' && !problem.retryable, problem);
    assert(problem.next_action === 'use_authorized_tool', problem);
    assert(problem.violations?.[0].tool_indexes?.[0] === 0, problem);
    console.log('denied');
    const slow = await proxy.POST('/sessions', { body: { ...grant, rate_limit_per_minute: 1 } });
    assert(slow.data !== undefined);
    const fast = { params: { path: { session_id: slow.data.session_id } }, body };
    await proxy.POST(CALLS, fast);
    problem = denied(429, await proxy.POST(CALLS, fast));
    assert(problem.code === 'rate_limited' && problem.retryable, problem);
    assert((problem.retry_after_secs ?? 0) >= 1, problem);
    console.log('rate limited');
    const query = { agent_id: AGENT, status: 'active' as const, limit: 1 };
    const page = await operator.GET('/sessions', { params: { query } });
    const cursor = page.data?.next_cursor;
    const rest = await operator.GET('/sessions', { params: { query: { ...query, cursor } } });
    const found = [page.data?.items[0].session_id, rest.data?.items[0].session_id].sort();
    assert(`${found}` === `${[session_id, slow.data.session_id].sort()}`, found);
    assert(rest.data?.next_cursor === undefined);
    console.log('list');
    const agent = { params: { path: { agent_id: AGENT } } };
    assert((await operator.GET('/agents/{agent_id}', agent)).data?.active_sessions === 2);
    const killed = await operator.DELETE('/agents/{agent_id}/sessions', agent);
    assert(killed.data?.closed === 2);
    console.log('kill switch');
    problem = denied(409, await proxy.POST(CALLS, { params: { path }, body }));
    assert(problem.code === 'session_closed');
    const unknown = { params: { path: { session_id: AGENT } } };
    problem = denied(404, await proxy.GET('/sessions/{session_id}', unknown));
    assert(problem.code === 'session_not_found');
    console.log('gone');
    const future = connect(FUTURE_URL, 'any');
    const later = await future.GET('/sessions/{session_id}', { params: { path } });
    assert(later.data?.status === 'dreaming' && later.data['colour'] === 'blue', later);
    problem = denied(403, await future.POST(CALLS, { params: { path }, body }));
    assert(problem.code === 'wrong_moon' && problem.next_action === 'look_up', problem);
    assert(problem['moon'] === 'full', problem);
    problem = denied(451, await future.GET('/agents/{agent_id}', agent));
    assert(problem.code === 'wrong_moon');
    console.log('future');
}

main().catch((error) => { throw error; });
