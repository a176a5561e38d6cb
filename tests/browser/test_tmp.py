import pytest
from tests.browser.conftest import *
from tests.browser.test_open_webui import lane, slow
pytestmark = pytest.mark.timeout(150)
async def test_x(start, open_page):
    async with slow("ollama", "small:1b") as engine, start(**lane(engine)):
        page = await open_page()
        p = page.page
        await p.goto(page._home + "/admin/settings/connections")
        await p.wait_for_timeout(4000)
        await page.shot("a")
        js = """()=>[...document.querySelectorAll('button,a')].filter(b=>b.offsetParent).map(b=>(b.id||'')+'|'+(b.getAttribute('aria-label')||'')+'|'+b.innerText.slice(0,30)).join('\\n')"""
        print(await p.evaluate(js))
        m = p.get_by_role("button", name="Manage")
        print("manage", await m.count())
        if await m.count():
            await m.last.click(); await p.wait_for_timeout(2500); await page.shot("b"); print(await p.evaluate(js))
            l = p.get_by_role("button", name="Load Model", exact=True)
            print(await l.count())
            if await l.count():
                await l.first.click(); await p.wait_for_timeout(3000); await page.shot("c"); print(engine.resident)
        assert 0
