// The journey with the client of openapi-generator, typescript-fetch.
import {
    AdmissionApi, AgentsApi, Configuration, Problem, ProblemFromJSON, ResponseError, SessionsApi,
} from './client';

declare const process: { env: Record<string, string> };
const { ARBITER_URL, FUTURE_URL, PROXY_TOKEN, OPERATOR_TOKEN, AGENT } = process.env;

function assert(holds: boolean, ...what: unknown[]): asserts holds {
    if (!holds) throw new Error(`assertion failed ${JSON.stringify(what)}`);
}

async function denied(status: number, ask: Promise<unknown>): Promise<Problem> {
    try {
        await ask;
    } catch (error) {
        assert(error instanceof ResponseError && error.response.status === status, `${error}`);
        return ProblemFromJSON(await error.response.json());
    }
    throw new Error('not denied');
}

async function main() {
    const proxy = new Configuration({ basePath: ARBITER_URL, accessToken: PROXY_TOKEN });
    const operator = new Configuration({ basePath: ARBITER_URL, accessToken: OPERATOR_TOKEN });
    const sessions = new SessionsApi(proxy), admission = new AdmissionApi(proxy);
    const listing = new SessionsApi(operator), agents = new AgentsApi(operator);

    const createSession = {
        agentId: AGENT, declaredIntent: 'journey', authorizedTools: ['read_file', 'fs.*'],
    };
    const session = await sessions.createSession({ createSession });
    assert(session.callBudget === 1000 && session.timeLimitSecs === 1800);
    console.log('create');
    const { sessionId } = session;
    assert((await sessions.getSession({ sessionId })).status === 'active');
    console.log('read');
    const plain = { toolName: 'read_file' };
    assert((await admission.recordCall({ sessionId, recordCall: plain }))?.callsMade === 1);
    console.log('call');
    const recordCall = { toolName: 'fs.list', agentId: AGENT, dataSensitivity: 'internal' as const };
    const keyed = { sessionId, recordCall, idempotencyKey: 'step-1' };
    const first = await admission.recordCallRaw(keyed), again = await admission.recordCallRaw(keyed);
    assert((await first.value()).callsMade === 2 && (await again.value()).callsMade === 2);
    assert(first.raw.headers.get('Idempotency-Replayed') === null);
    assert(again.raw.headers.get('Idempotency-Replayed') === 'true');
    console.log('repeat');
    const minimal = await admission.recordCall({ sessionId, recordCall, prefer: 'return=minimal' });
    assert(minimal === null);
    console.log('minimal');
    const recordBatch = { toolNames: ['fs.list', 'fs.stat'] };
    assert((await admission.recordBatch({ sessionId, recordBatch }))?.callsMade === 5);
    console.log('batch');
    assert((await admission.recordCall({ sessionId, recordCall, dryRun: true }))?.callsMade === 6);
    assert((await sessions.getSession({ sessionId })).callsMade === 5);
    console.log('dry run');
    const wrong = { sessionId, recordCall: { toolName: 'rm' } };
    let problem = await denied(403, admission.recordCall(wrong));
    assert(problem.code === 'tool_not_authorized' && !problem.retryable, problem);
    assert(problem.nextAction === 'use_authorized_tool', problem);
    assert(problem.violations?.[0].toolIndexes?.[0] === 0, problem);
    console.log('denied');
    const slow = await sessions.createSession({
        createSession: { ...createSession, rateLimitPerMinute: 1 },
    });
    await admission.recordCall({ sessionId: slow.sessionId, recordCall });
    problem = await denied(429, admission.recordCall({ sessionId: slow.sessionId, recordCall }));
    assert(problem.code === 'rate_limited' && problem.retryable, problem);
    assert((problem.retryAfterSecs ?? 0) >= 1, problem);
    console.log('rate limited');
    const wanted = { agentId: AGENT, status: 'active' as const, limit: 1 };
    const page = await listing.listSessions(wanted);
    const rest = await listing.listSessions({ ...wanted, cursor: page.nextCursor });
    const found = [page.items[0].sessionId, rest.items[0].sessionId].sort();
    assert(`${found}` === `${[sessionId, slow.sessionId].sort()}` && !rest.nextCursor);
    console.log('list');
    assert((await agents.getAgent({ agentId: AGENT })).activeSessions === 2);
    assert((await agents.closeAgentSessions({ agentId: AGENT })).closed === 2);
    console.log('kill switch');
    problem = await denied(409, admission.recordCall({ sessionId, recordCall }));
    assert(problem.code === 'session_closed');
    problem = await denied(404, sessions.getSession({ sessionId: AGENT }));
    assert(problem.code === 'session_not_found');
    console.log('gone');
    const future = new Configuration({ basePath: FUTURE_URL });
    const later = await new SessionsApi(future).getSession({ sessionId });
    assert(later.status === 'dreaming' && later['colour'] === 'blue', later);
    problem = await denied(403, new AdmissionApi(future).recordCall({ sessionId, recordCall }));
    assert(problem.code === 'wrong_moon' && problem.nextAction === 'look_up', problem);
    assert(problem['moon'] === 'full', problem);
    problem = await denied(451, new AgentsApi(future).getAgent({ agentId: AGENT }));
    assert(problem.code === 'wrong_moon');
    console.log('future');
}

main().catch((error) => { throw error; });
