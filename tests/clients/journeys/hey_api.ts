// The journey with the client of hey-api (@hey-api/openapi-ts).
import * as arbiter from './client';
import { createClient } from './client/client';

declare const process: { env: Record<string, string> };
const { ARBITER_URL, FUTURE_URL, PROXY_TOKEN, OPERATOR_TOKEN, AGENT } = process.env;

function assert(holds: boolean, ...what: unknown[]): asserts holds {
    if (!holds) throw new Error(`assertion failed ${JSON.stringify(what)}`);
}

function denied(
    status: number, answer: { error?: arbiter.Problem; response?: Response },
): arbiter.Problem {
    assert(answer.response?.status === status && answer.error !== undefined, answer.error);
    return answer.error;
}

async function main() {
    const proxy = createClient({ baseUrl: ARBITER_URL, auth: PROXY_TOKEN });
    const operator = createClient({ baseUrl: ARBITER_URL, auth: OPERATOR_TOKEN });
    const grant = {
        agent_id: AGENT, declared_intent: 'journey', authorized_tools: ['read_file', 'fs.*'],
    };
    const created = await arbiter.createSession({ client: proxy, body: grant });
    assert(created.data?.call_budget === 1000 && created.data.time_limit_secs === 1800, created);
    console.log('create');
    const { session_id } = created.data;
    const here = { client: proxy, path: { session_id } };
    assert((await arbiter.getSession(here)).data?.status === 'active');
    console.log('read');
    const plain = await arbiter.recordCall({ ...here, body: { tool_name: 'read_file' } });
    assert(plain.data?.calls_made === 1);
    console.log('call');
    const body = { tool_name: 'fs.list', agent_id: AGENT, data_sensitivity: 'internal' as const };
    const keyed = { ...here, body, headers: { 'Idempotency-Key': 'step-1' } };
    const first = await arbiter.recordCall(keyed), again = await arbiter.recordCall(keyed);
    assert(first.data?.calls_made === 2 && again.data?.calls_made === 2);
    assert(first.response?.headers.get('Idempotency-Replayed') === null);
    assert(again.response?.headers.get('Idempotency-Replayed') === 'true');
    console.log('repeat');
    const headers = { Prefer: 'return=minimal' as const };
    const minimal = await arbiter.recordCall({ ...here, body, headers });
    assert(minimal.response?.status === 204 && !minimal.error);
    console.log('minimal');
    const tool_names = ['fs.list', 'fs.stat'];
    const batch = await arbiter.recordBatch({ ...here, body: { tool_names } });
    assert(batch.data?.calls_made === 5);
    console.log('batch');
    const dry = await arbiter.recordCall({ ...here, body, query: { dry_run: true } });
    assert(dry.data?.calls_made === 6);
    assert((await arbiter.getSession(here)).data?.calls_made === 5);
    console.log('dry run');
    let problem = denied(403, await arbiter.recordCall({ ...here, body: { tool_name: 'rm' } }));
    assert(problem.code === 'tool_not_authorized' && !problem.retryable, problem);
    assert(problem.next_action === 'use_authorized_tool', problem);
    assert(problem.violations?.[0].tool_indexes?.[0] === 0, problem);
    console.log('denied');
    const slow = await arbiter.createSession({
        client: proxy, body: { ...grant, rate_limit_per_minute: 1 },
    });
    assert(slow.data !== undefined);
    const there = { client: proxy, path: { session_id: slow.data.session_id }, body };
    await arbiter.recordCall(there);
    problem = denied(429, await arbiter.recordCall(there));
    assert(problem.code === 'rate_limited' && problem.retryable, problem);
    assert((problem.retry_after_secs ?? 0) >= 1, problem);
    console.log('rate limited');
    const query = { agent_id: AGENT, status: 'active' as const, limit: 1 };
    const page = await arbiter.listSessions({ client: operator, query });
    const cursor = page.data?.next_cursor;
    const rest = await arbiter.listSessions({ client: operator, query: { ...query, cursor } });
    const found = [page.data?.items[0].session_id, rest.data?.items[0].session_id].sort();
    assert(`${found}` === `${[session_id, slow.data.session_id].sort()}`, found);
    assert(rest.data?.next_cursor === undefined);
    console.log('list');
    const agent = { client: operator, path: { agent_id: AGENT } };
    assert((await arbiter.getAgent(agent)).data?.active_sessions === 2);
    assert((await arbiter.closeAgentSessions(agent)).data?.closed === 2);
    console.log('kill switch');
    problem = denied(409, await arbiter.recordCall({ ...here, body }));
    assert(problem.code === 'session_closed');
    const unknown = { client: proxy, path: { session_id: AGENT } };
    problem = denied(404, await arbiter.getSession(unknown));
    assert(problem.code === 'session_not_found');
    console.log('gone');
    const future = createClient({ baseUrl: FUTURE_URL });
    const later = await arbiter.getSession({ ...here, client: future });
    assert(later.data?.status === 'dreaming' && later.data['colour'] === 'blue', later);
    problem = denied(403, await arbiter.recordCall({ ...here, client: future, body }));
    assert(problem.code === 'wrong_moon' && problem.next_action === 'look_up', problem);
    assert(problem['moon'] === 'full', problem);
    problem = denied(451, await arbiter.getAgent({ ...agent, client: future }));
    assert(problem.code === 'wrong_moon');
    console.log('future');
}

main().catch((error) => { throw error; });
